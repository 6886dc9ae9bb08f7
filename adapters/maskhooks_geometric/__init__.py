"""PyTorch Geometric for maskhooks: the messages that the layers of a graph neural network send along each edge."""

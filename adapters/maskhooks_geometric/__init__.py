"""PyTorch Geometric for maskhooks: the messages that a graph neural network's layers send, edge by edge."""

"""Recurrent networks of torch for maskhooks: the states that nn.RNN, nn.GRU and nn.LSTM compute in one fused call."""

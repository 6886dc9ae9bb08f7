"""Recurrent networks for maskhooks: the hidden states that nn.RNN, nn.GRU and nn.LSTM compute in one fused call."""

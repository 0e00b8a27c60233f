"""PWC-Net: its operators, the network, its losses and its metrics."""

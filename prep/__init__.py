"""Data preparation: convert optical-flow data sets to MindRecord shards and read them back."""

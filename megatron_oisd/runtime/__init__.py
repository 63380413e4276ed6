"""What a process needs before it trains: devices or their stand-in, process groups, the model."""

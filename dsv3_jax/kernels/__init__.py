"""Fast implementations of single operations, one folder an op: `api.py` picks one, or says why it was refused."""

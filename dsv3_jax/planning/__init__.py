"""What a run costs, before it runs: parameters, FLOPs, memory."""

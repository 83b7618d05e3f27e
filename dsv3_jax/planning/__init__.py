"""What a run costs, before it runs: parameters, FLOPs, memory; and compilers for machines that are not here."""

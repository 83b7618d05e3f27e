"""What benchmarks compare with: the only place that imports torch and transformers."""

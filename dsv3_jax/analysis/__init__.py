"""What notebooks and TensorBoard show: attention maps, router statistics."""

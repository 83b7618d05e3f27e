"""Pure functions on arrays: no Flax, no mesh, no flags. Callable bare from a notebook."""

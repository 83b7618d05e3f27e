"""Grid -> runs -> rows -> table and plots."""

"""The experiments of the two papers on the embedded world: recipes, tables and figures."""

"""How much memory a run will take, found out without running it."""

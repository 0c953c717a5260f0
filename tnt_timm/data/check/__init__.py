"""`tnt-check`: read a whole dataset once and report what is wrong with it, without changing it."""

"""`tnt-check DIR`: reads a whole data set once, says what is wrong with it, and changes nothing."""

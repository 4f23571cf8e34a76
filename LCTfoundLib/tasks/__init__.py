"""Tasks: a request, a result and one function from one to the other."""

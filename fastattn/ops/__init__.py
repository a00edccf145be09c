"""One file an operation: checks, registered operators, autograd Function, public function."""

"""Starting the toolkit: environments, ranks of mpirun, the demo and the tests."""

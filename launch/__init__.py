"""How commands run, on one rank or many; imports none of the other folders."""

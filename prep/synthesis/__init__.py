"""How synthetic pairs are made: version1.py and version2.py draw them, the other files are their parts."""

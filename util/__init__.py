"""Everything around the network: configuration, files, and a package for each kind of work."""

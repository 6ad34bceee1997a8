"""Model definitions: linen modules, their named sizes, weight tables and sharding rows."""

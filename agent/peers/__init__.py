"""One download per site: agents of a site give each other what they have fetched."""

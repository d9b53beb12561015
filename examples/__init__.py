"""Programs around the toolkit that serve one page of docs/ each."""

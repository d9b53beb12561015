"""HTML pages of one look: what their templates share, and charts as inline SVG."""

"""`pbe app`: a web server for one machine and the people around it. They edit photos and look into datasets in a browser."""

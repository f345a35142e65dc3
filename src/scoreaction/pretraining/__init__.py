"""The scripts that made the models which the package ships."""

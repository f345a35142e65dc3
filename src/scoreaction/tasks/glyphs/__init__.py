"""Printed digits, three to five in a picture: the drawing, the network and its pretraining."""

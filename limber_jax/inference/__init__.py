"""Trained models put to use on images: what the commands call, and other programs may."""

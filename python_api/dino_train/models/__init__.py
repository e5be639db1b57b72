"""Backbones and head, published weights in, export out."""

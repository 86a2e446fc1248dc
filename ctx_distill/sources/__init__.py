"""Builders of manifests: one module a public data set, and one for a hospital's DICOM."""

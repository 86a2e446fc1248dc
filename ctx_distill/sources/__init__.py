"""Build manifests: one module per public data set, and one for DICOM folders of a hospital."""

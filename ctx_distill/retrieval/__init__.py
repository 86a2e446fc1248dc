"""Retrieval of radiographs for CT reports: the FAISS index, the feature store, the lookup of neighbours."""

"""Records of measurements, installed as kvspn.measure.records as far as the package reads them."""

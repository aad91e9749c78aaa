"""`sluice demo`: the whole loop on real sentences, as an application and its people would drive it."""

"""The ground floor: a module lives here only while two steps need it."""

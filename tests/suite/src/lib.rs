//! Holds no code: the privileged and end-to-end tests are in `tests/`, one file an area, on the kit in `tests/kit`.

//! Controllers of nodes: are they alive (`lifecycle`), may pods stay on them (`eviction`), which addresses do their
//! pods get (`ipam`), and what is left behind when they go (`pod_gc`).

pub(crate) mod eviction;
pub(crate) mod health;
pub(crate) mod ipam;
pub(crate) mod lifecycle;
pub(crate) mod pod_gc;

//! A store that keeps nothing over a restart: for tests and for trying things out.

use crate::StoreError;
use crate::durable::Volatile;
use crate::resident::Resident;
use crate::view::{TailLimits, View};
use crate::writer::Engine;

/// A [`Store`](crate::Store) in memory.
pub struct MemoryStore {
    engine: Engine,
}

impl MemoryStore {
    /// An empty store at revision 1.
    pub fn new() -> Result<MemoryStore, StoreError> {
        Ok(MemoryStore { engine: Engine::start(View::new(1, 1, TailLimits::default()), Volatile)? })
    }
}

impl Resident for MemoryStore {
    fn engine(&self) -> &Engine {
        &self.engine
    }
}

//! The seam between a ruleset's owner and nf_tables.

use crate::Result;
use crate::key::Bytes;
use crate::model::{Element, Table, Transaction};

/// Something that holds nf_tables state: the kernel, or a fake.
pub trait Kernel: Send {
    /// Carries a transaction out, wholly or not at all. An empty one does nothing.
    fn commit(&mut self, transaction: &Transaction) -> Result<()>;

    /// The comment of a table, empty when it has none; `None` without the table.
    fn table_comment(&mut self, table: &Table) -> Result<Option<String>>;

    /// The names of a table's chains.
    fn chains(&mut self, table: &Table) -> Result<Vec<String>>;

    /// How many rules a table's chains have together.
    fn rule_count(&mut self, table: &Table) -> Result<usize>;

    /// The rules of a table in their order, each as its chain and its comment, which is empty when it has none.
    fn rules(&mut self, table: &Table) -> Result<Vec<(String, String)>>;

    /// The elements of a set; `None` without the set or the table.
    fn elements(&mut self, table: &Table, set: &str) -> Result<Option<Vec<Element>>>;

    /// One element of a set, whatever the number of the others; `None` without it, the set or the table.
    fn element(&mut self, table: &Table, set: &str, key: &Bytes) -> Result<Option<Element>> {
        Ok(self.elements(table, set)?.into_iter().flatten().find(|element| element.key == *key))
    }

    /// A number that changes with every commit of anybody, but not with elements that rules add.
    fn generation(&mut self) -> Result<u32>;
}

//! Which plugin set what of which container, so that no two set the same thing unnoticed.
//!
//! A plugin that wants to change what another one set removes it first, in the same answer; it then owns it. The record is
//! in the interface's own form, because validators are shown it.

use crate::api::{self, Field};
use crate::error::Error;
use crate::merge::{mark, marked_for_removal};

/// What has been claimed while one request went round the plugins.
#[derive(Debug, Default)]
pub(crate) struct Owners {
    record: api::OwningPlugins,
}

impl Owners {
    pub(crate) fn record(&self) -> api::OwningPlugins {
        self.record.clone()
    }

    fn of(&mut self, container: &str) -> &mut api::FieldOwners {
        self.record.owners.entry(container.to_owned()).or_default()
    }

    /// Claims a field that is set as a whole.
    pub(crate) fn claim(&mut self, container: &str, field: Field, plugin: &str) -> Result<(), Error> {
        let simple = &mut self.of(container).simple;
        refuse(simple.get(&(field as i32)), plugin, || name(field))?;
        simple.insert(field as i32, plugin.to_owned());
        Ok(())
    }

    /// Claims one entry of a field that has many.
    pub(crate) fn claim_entry(
        &mut self,
        container: &str,
        field: Field,
        entry: &str,
        plugin: &str,
    ) -> Result<(), Error> {
        let owners = &mut self.of(container).compound.entry(field as i32).or_default().owners;
        refuse(owners.get(entry), plugin, || format!("{} {entry}", name(field)))?;
        owners.insert(entry.to_owned(), plugin.to_owned());
        Ok(())
    }

    /// Notes one more plugin that added to a field to which all may add.
    pub(crate) fn add(&mut self, container: &str, field: Field, plugin: &str) {
        let owner = self.of(container).simple.entry(field as i32).or_default();
        if !owner.is_empty() {
            owner.push(',');
        }
        owner.push_str(plugin);
    }

    /// The plugin removed what was set; it alone may set it again.
    pub(crate) fn clear(&mut self, container: &str, field: Field, plugin: &str) {
        self.of(container).simple.insert(field as i32, mark(plugin));
    }

    /// As [`Owners::clear`], of one entry.
    pub(crate) fn clear_entry(&mut self, container: &str, field: Field, entry: &str, plugin: &str) {
        let owners = &mut self.of(container).compound.entry(field as i32).or_default().owners;
        owners.insert(entry.to_owned(), mark(plugin));
    }
}

fn refuse(owner: Option<&String>, plugin: &str, what: impl FnOnce() -> String) -> Result<(), Error> {
    let Some(owner) = owner else { return Ok(()) };
    let other = match marked_for_removal(owner) {
        Some(clearer) if clearer == plugin => return Ok(()),
        Some(clearer) => clearer,
        None => owner,
    };
    Err(Error::Conflict { plugin: plugin.to_owned(), other: other.to_owned(), what: what() })
}

fn name(field: Field) -> String {
    field.as_str_name().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_to_set_one_thing_is_refused_and_both_are_named() {
        let mut owners = Owners::default();
        owners.claim("c", Field::CpuShares, "00-a").unwrap();
        owners.claim("d", Field::CpuShares, "10-b").unwrap();
        let error = owners.claim("c", Field::CpuShares, "10-b").unwrap_err().to_string();
        assert_eq!(error, r#"plugins "10-b" and "00-a" both tried to set CPUShares"#);
        owners.claim_entry("c", Field::Env, "HOME", "00-a").unwrap();
        owners.claim_entry("c", Field::Env, "PATH", "10-b").unwrap();
        let error = owners.claim_entry("c", Field::Env, "HOME", "10-b").unwrap_err().to_string();
        assert_eq!(error, r#"plugins "10-b" and "00-a" both tried to set Env HOME"#);
    }

    #[test]
    fn who_removes_a_thing_may_set_it_and_nobody_else() {
        let mut owners = Owners::default();
        owners.claim_entry("c", Field::Mounts, "/a", "00-a").unwrap();
        owners.clear_entry("c", Field::Mounts, "/a", "10-b");
        assert!(owners.claim_entry("c", Field::Mounts, "/a", "20-c").is_err());
        owners.claim_entry("c", Field::Mounts, "/a", "10-b").unwrap();
    }
}

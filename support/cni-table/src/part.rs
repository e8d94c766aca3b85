//! What one plugin has in the table for one attachment.

use oarlock_nft::{Element, Table};
use serde::{Deserialize, Serialize};

use crate::firewall::Firewall;
use crate::foundation::Foundation;
use crate::host_ports::HostPorts;
use crate::masquerade::Masquerade;
use crate::spoof_check::{self, SpoofCheck};

/// A part as it is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Part {
    Masquerade(Masquerade),
    HostPorts(HostPorts),
    Firewall(Firewall),
    SpoofCheck(SpoofCheck),
}

/// What happens when somebody else's element is in an entry's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Conflict {
    /// It was left behind: whoever has the address now has the element too.
    Replace,
    Refuse,
    /// It says the same.
    Share,
}

/// An element of a part, with the set it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub set: &'static str,
    pub element: Element,
    pub(crate) conflict: Conflict,
}

impl Entry {
    pub(crate) fn own(set: &'static str, element: Element) -> Entry {
        Entry { set, element, conflict: Conflict::Replace }
    }

    pub(crate) fn exclusive(set: &'static str, element: Element) -> Entry {
        Entry { set, element, conflict: Conflict::Refuse }
    }

    pub(crate) fn shared(set: &'static str, element: Element) -> Entry {
        Entry { set, element, conflict: Conflict::Share }
    }

    /// Whether the element that is in the entry's place does what the entry asks for, for the same owner.
    pub fn is_met_by(&self, found: &Element) -> bool {
        let same_owner = self.conflict == Conflict::Share || found.comment == self.element.comment;
        same_owner && found.key == self.element.key && found.value == self.element.value
    }
}

impl Part {
    pub fn table(&self) -> Table {
        let is_ipv4 = match self {
            Part::Masquerade(part) => part.is_ipv4(),
            Part::HostPorts(part) => part.address.is_ipv4(),
            Part::Firewall(part) => part.is_ipv4,
            Part::SpoofCheck(_) => return spoof_check::table(),
        };
        crate::table(is_ipv4)
    }

    pub fn foundation(&self) -> Foundation {
        match self {
            Part::Masquerade(part) => part.foundation(),
            Part::HostPorts(part) => part.foundation(),
            Part::Firewall(part) => part.foundation(),
            Part::SpoofCheck(_) => SpoofCheck::foundation(),
        }
    }

    pub fn entries(&self, owner: &str) -> Vec<Entry> {
        match self {
            Part::Masquerade(part) => part.entries(owner),
            Part::HostPorts(part) => part.entries(owner),
            Part::Firewall(part) => part.entries(),
            Part::SpoofCheck(part) => part.entries(owner),
        }
    }
}

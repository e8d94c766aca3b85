//! [`Pool`]: the node's ids in equal ranges, one for each pod that asks. Pure.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// Ranges begin and end at multiples of it.
pub(crate) const UNIT: u32 = 65_536;

/// Why a pod can have no ids of its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UsersError {
    #[error("could not find an empty slot to allocate a user namespace")]
    NoRoom,
    #[error("kubelet user assigned ID {first} must be a multiple of {length} and not less")]
    First { first: u32, length: u32 },
    #[error("kubelet user assigned IDs length {total} is not a multiple of {length}")]
    Length { total: u64, length: u32 },
    #[error("kubelet user assigned IDs are not enough to support {pods} pods")]
    TooFew { pods: u32 },
    #[error(
        "{}: {problem}; a pod's ids are not known any more, and no other pod may get them: end its containers and remove the file",
        file.display()
    )]
    Record { file: PathBuf, problem: String },
    #[error("{file}: {problem}")]
    File { file: &'static str, problem: String },
}

/// Ids on the node that stand for those from 0 up in a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Range {
    pub first: u32,
    pub length: u32,
}

impl Range {
    fn overlaps(self, other: Range) -> bool {
        let end = |range: Range| u64::from(range.first) + u64::from(range.length);
        u64::from(self.first) < end(other) && u64::from(other.first) < end(self)
    }
}

/// All ids that may be handed out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Host {
    pub first: u32,
    pub total: u64,
}

/// Who has which range.
#[derive(Debug)]
pub(crate) struct Pool {
    host: Host,
    length: u32,
    taken: BTreeMap<String, Range>,
}

impl Pool {
    /// `host`: what the node's administrator set aside; without it as many ranges as pods, from the second on.
    pub(crate) fn new(host: Option<Host>, length: u32, most_pods: u32) -> Result<Self, UsersError> {
        let total = u64::from(length) * u64::from(most_pods);
        let host = host.unwrap_or(Host { first: length, total });
        // Root of the node is in nobody's range.
        if host.first < length || !host.first.is_multiple_of(length) {
            return Err(UsersError::First { first: host.first, length });
        }
        if !host.total.is_multiple_of(u64::from(length)) {
            return Err(UsersError::Length { total: host.total, length });
        }
        let fits = u64::from(host.first) + host.total <= 1 << 32;
        if host.total < total || !fits {
            return Err(UsersError::TooFew { pods: most_pods });
        }
        Ok(Self { host, length, taken: BTreeMap::new() })
    }

    pub(crate) fn of(&self, uid: &str) -> Option<Range> {
        self.taken.get(uid).copied()
    }

    /// What a pod was given by an agent before this one, maybe from other ids.
    pub(crate) fn restore(&mut self, uid: &str, range: Range) {
        self.taken.insert(uid.to_owned(), range);
    }

    /// The pod's range; the lowest free one if it has none yet.
    pub(crate) fn take(&mut self, uid: &str) -> Result<Range, UsersError> {
        if let Some(range) = self.of(uid) {
            return Ok(range);
        }
        let slots = self.host.total / u64::from(self.length);
        let starts = (0..slots)
            .filter_map(|slot| u32::try_from(u64::from(self.host.first) + slot * u64::from(self.length)).ok());
        let mut ranges = starts.map(|first| Range { first, length: self.length });
        let free = ranges.find(|range| !self.taken.values().any(|taken| taken.overlaps(*range)));
        let range = free.ok_or(UsersError::NoRoom)?;
        self.taken.insert(uid.to_owned(), range);
        Ok(range)
    }

    pub(crate) fn release(&mut self, uid: &str) {
        self.taken.remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pod_has_a_range_of_its_own_and_ids_come_back() {
        let mut pool = Pool::new(None, UNIT, 2).unwrap();
        let (a, b) = (pool.take("a").unwrap(), pool.take("b").unwrap());
        assert_eq!((a.first, b.first, a.length), (65_536, 131_072, 65_536));
        assert_eq!(pool.take("a"), Ok(a), "a pod keeps its range");
        assert_eq!(pool.take("c"), Err(UsersError::NoRoom));
        pool.release("a");
        assert_eq!(pool.take("c"), Ok(a));
    }

    #[test]
    fn a_range_of_an_earlier_configuration_is_nobody_elses() {
        let mut pool = Pool::new(None, 2 * UNIT, 3).unwrap();
        pool.restore("old", Range { first: 3 * UNIT, length: UNIT });
        assert_eq!(pool.take("new").unwrap().first, 4 * UNIT);
        assert_eq!(pool.take("old").unwrap(), Range { first: 3 * UNIT, length: UNIT });
    }

    #[test]
    fn ids_set_aside_must_be_whole_enough_and_without_root() {
        let of = |first, total| Pool::new(Some(Host { first, total }), UNIT, 2).map(drop);
        assert_eq!(of(UNIT, 2 * 65_536), Ok(()));
        assert_eq!(of(0, 2 * 65_536), Err(UsersError::First { first: 0, length: UNIT }));
        assert_eq!(of(UNIT + 1, 2 * 65_536), Err(UsersError::First { first: UNIT + 1, length: UNIT }));
        assert_eq!(of(UNIT, 65_536 * 3 - 1), Err(UsersError::Length { total: 65_536 * 3 - 1, length: UNIT }));
        assert_eq!(of(UNIT, 65_536), Err(UsersError::TooFew { pods: 2 }));
        assert_eq!(of(u32::MAX - UNIT + 1, 2 * 65_536), Err(UsersError::TooFew { pods: 2 }));
    }
}

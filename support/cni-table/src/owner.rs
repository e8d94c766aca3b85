//! Whose an element or a record is.

/// A hash of a name (FNV-1a), stable across versions: names of links, chains and records are made of it.
pub fn stable_hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// An attachment as the comment on what belongs to it in the kernel: the network, the attachment, and for readers the
/// container, in few bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    network: String,
    text: String,
}

impl Owner {
    pub fn new(network: &str, container_id: &str, ifname: &str) -> Owner {
        let network_hash = format!("{:08x}", stable_hash(&[network]) as u32);
        let shown = container_id.get(..64).unwrap_or(container_id);
        let text = format!("{network_hash}-{:016x} {shown}", stable_hash(&[network, container_id, ifname]));
        Owner { network: network_hash, text }
    }

    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The part of the text that has no container id: as a file's name.
    pub(crate) fn key(&self) -> &str {
        self.text.split(' ').next().unwrap_or(&self.text)
    }

    /// Whether `comment`, or a key, is that of an attachment to `network` which is none of `valid`.
    pub fn is_stale(comment: &str, network: &str, valid: &[Owner]) -> bool {
        let is_valid = |owner: &Owner| owner.text == comment || owner.key() == comment;
        comment.starts_with(&Owner::new(network, "", "").network) && !valid.iter().any(is_valid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_collection_looks_at_its_own_network_only() {
        let (mine, other) = (Owner::new("a", "c1", "eth0"), Owner::new("b", "c1", "eth0"));
        for text in [mine.as_str(), mine.key()] {
            assert!(Owner::is_stale(text, "a", &[]));
            assert!(!Owner::is_stale(text, "a", std::slice::from_ref(&mine)));
        }
        assert!(!Owner::is_stale(other.as_str(), "a", &[]) && !Owner::is_stale(other.key(), "a", &[]));
        assert!(Owner::new("n", &"x".repeat(200), "eth0").as_str().len() < 128);
    }
}

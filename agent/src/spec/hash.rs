//! The hash of a container's definition, equal to the upstream kubelet's, so that either adopts the other's containers.

use k8s_openapi::api::core::v1::Container;

/// Hexadecimal FNV-1a (32 bit) over upstream's rendering of the container's name and image.
pub(crate) fn container_hash(container: &Container) -> String {
    let fields = serde_json::json!({ "image": container.image.as_deref().unwrap_or(""), "name": container.name });
    let json = fields.to_string();
    let bytes: Vec<String> = json.bytes().map(|byte| byte.to_string()).collect();
    let rendered = format!("([]uint8)[{}]", bytes.join(" "));
    format!("{:x}", fnv1a_32(rendered.as_bytes()))
}

/// FNV-1a, 32 bit.
pub(crate) fn fnv1a_32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv_matches_the_published_vectors() {
        assert_eq!(fnv1a_32(b""), 0x811c_9dc5);
        assert_eq!(fnv1a_32(b"foobar"), 0xbf9c_f968);
    }

    #[test]
    fn only_name_and_image_count() {
        let plain = Container { name: "c".into(), image: Some("i:1".into()), ..Default::default() };
        let other_command = Container { command: Some(vec!["x".into()]), ..plain.clone() };
        let other_image = Container { image: Some("i:2".into()), ..plain.clone() };
        assert_eq!(container_hash(&plain), container_hash(&other_command));
        assert_ne!(container_hash(&plain), container_hash(&other_image));
    }
}

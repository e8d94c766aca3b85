//! Reading who the machine is.

use std::fs::read_to_string;

use super::status::Identity;

/// Reads the machine's identity; blocks on files. What cannot be read is empty.
pub(crate) fn read() -> Identity {
    let line = |path: &str| read_to_string(path).unwrap_or_default().trim().to_owned();
    let machine_id = line("/etc/machine-id");
    let product = line("/sys/class/dmi/id/product_uuid");
    let os_release = read_to_string("/etc/os-release").unwrap_or_default();
    let pretty = os_release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    Identity {
        swap_bytes: 0,
        system_uuid: if product.is_empty() { machine_id.clone() } else { product },
        machine_id,
        boot_id: line("/proc/sys/kernel/random/boot_id"),
        kernel: line("/proc/sys/kernel/osrelease"),
        os_image: pretty.unwrap_or("Linux").trim_matches('"').to_owned(),
        architecture: architecture.to_owned(),
        host_name: line("/proc/sys/kernel/hostname"),
    }
}

//! Small facts about this machine that commands need.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::PathBuf;

/// The address of the interface that the default route uses: what the kernel would choose as the source of a datagram to
/// the outside. Nothing is sent. Without a default route it is the first address that is not loopback, else loopback.
pub(crate) fn default_address(is_ipv4: bool) -> IpAddr {
    let (any, outside, loopback) = if is_ipv4 {
        (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V4(Ipv4Addr::LOCALHOST))
    } else {
        let outside = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
        (IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V6(outside), IpAddr::V6(Ipv6Addr::LOCALHOST))
    };
    let by_route = || -> std::io::Result<IpAddr> {
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((outside, 9))?;
        Ok(socket.local_addr()?.ip())
    };
    let by_interface = || {
        let address = |interface: nix::ifaddrs::InterfaceAddress| {
            let address = interface.address?;
            if is_ipv4 {
                address.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()))
            } else {
                let address = address.as_sockaddr_in6().map(|address| address.ip());
                address.filter(|address| !address.is_unicast_link_local()).map(IpAddr::V6)
            }
        };
        nix::ifaddrs::getifaddrs().ok()?.filter_map(address).find(|address| !address.is_loopback())
    };
    by_route().ok().or_else(by_interface).unwrap_or(loopback)
}

/// A program that is installed beside this one.
pub(crate) fn sibling_program(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let beside = own.with_file_name(name);
    if beside.exists() {
        return Ok(beside);
    }
    for directory in std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()) {
        let candidate = directory.join(name);
        if candidate.exists() {
            return Ok(candidate);
        }
    }
    anyhow::bail!("{name} is neither beside {} nor in PATH", own.display())
}

/// Fails with a clear sentence when not run as root.
pub(crate) fn require_root(what: &str) -> anyhow::Result<()> {
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "{what} needs root: it makes namespaces, mounts, cgroups and network links"
    );
    Ok(())
}

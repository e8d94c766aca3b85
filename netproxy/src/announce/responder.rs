//! Answering on one link for the addresses of this node, and telling the segment of new ones.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::time::Duration;

use oarlock_netlink::Mac;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, warn};

use super::frames;
use super::socket::{Kind, PacketSocket};

/// A new address is told so often, once a second.
const TOLD_TIMES: u32 = 5;
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// All addresses are told again so often, for whoever missed it.
const REMIND_INTERVAL: Duration = Duration::from_secs(60);
const RETRY_INTERVAL: Duration = Duration::from_secs(2);
const FRAME_BYTES: usize = 256;

/// A link by what frames need to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port {
    pub link: u32,
    pub mac: Mac,
}

/// Answers on `port` for what `addresses` says, until its sender is gone.
pub async fn run(port: Port, mut addresses: watch::Receiver<BTreeSet<IpAddr>>) {
    loop {
        match serve(port, &mut addresses).await {
            Ok(()) => return,
            Err(error) => {
                warn!(
                    link = port.link,
                    error = &error as &dyn std::error::Error,
                    "balancer addresses cannot be announced; trying again"
                );
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
        if addresses.has_changed().is_err() {
            return;
        }
    }
}

async fn serve(port: Port, addresses: &mut watch::Receiver<BTreeSet<IpAddr>>) -> io::Result<()> {
    let sockets = [PacketSocket::open(Kind::Arp, port.link)?, PacketSocket::open(Kind::Solicitations, port.link)?];
    let mut groups = Groups::new(port.link);
    let mut own = addresses.borrow_and_update().clone();
    groups.follow(&own);
    // How often each address is still to be told.
    let mut untold: BTreeMap<IpAddr, u32> = own.iter().map(|address| (*address, TOLD_TIMES)).collect();
    let mut tell = interval(TELL_INTERVAL);
    tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut reminded = Instant::now();
    let (mut arp, mut solicitation) = ([0; FRAME_BYTES], [0; FRAME_BYTES]);
    loop {
        let frame = tokio::select! {
            changed = addresses.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let now = addresses.borrow_and_update().clone();
                untold.retain(|address, _| now.contains(address));
                untold.extend(now.difference(&own).map(|address| (*address, TOLD_TIMES)));
                groups.follow(&now);
                own = now;
                tell.reset_immediately();
                continue;
            }
            _ = tell.tick() => {
                if reminded.elapsed() >= REMIND_INTERVAL {
                    reminded = Instant::now();
                    for address in &own {
                        untold.entry(*address).or_insert(1);
                    }
                }
                untold.retain(|address, times| {
                    announce(&sockets, *address, port.mac);
                    *times -= 1;
                    *times > 0
                });
                continue;
            }
            length = sockets[0].receive(&mut arp) => &arp[..length?],
            length = sockets[1].receive(&mut solicitation) => &solicitation[..length?],
        };
        let Some(question) = frames::read(frame, port.mac).filter(|question| own.contains(&question.target)) else {
            continue;
        };
        if let Some(answer) = frames::answer(&question, port.mac) {
            transmit(&sockets, question.target, &answer);
        }
    }
}

fn announce(sockets: &[PacketSocket; 2], address: IpAddr, mac: Mac) {
    frames::announcement(address, mac).iter().for_each(|frame| transmit(sockets, address, frame));
}

fn transmit(sockets: &[PacketSocket; 2], address: IpAddr, frame: &[u8]) {
    if let Err(error) = sockets[usize::from(address.is_ipv6())].send(frame) {
        debug!(%address, error = &error as &dyn std::error::Error, "frame lost");
    }
}

/// Membership in the groups that questions for IPv6 addresses go to: the link lets them pass, and switches know.
struct Groups {
    link: u32,
    socket: Option<UdpSocket>,
    joined: BTreeSet<Ipv6Addr>,
}

impl Groups {
    fn new(link: u32) -> Groups {
        Groups { link, socket: None, joined: BTreeSet::new() }
    }

    fn follow(&mut self, addresses: &BTreeSet<IpAddr>) {
        let group = |address: &IpAddr| match address {
            IpAddr::V6(address) => Some(frames::solicited_group(*address)),
            IpAddr::V4(_) => None,
        };
        let wanted: BTreeSet<Ipv6Addr> = addresses.iter().filter_map(group).collect();
        if wanted == self.joined {
            return;
        }
        if let Err(error) = self.change(&wanted) {
            warn!(
                link = self.link,
                error = &error as &dyn std::error::Error,
                "groups of IPv6 addresses cannot be joined"
            );
        }
    }

    fn change(&mut self, wanted: &BTreeSet<Ipv6Addr>) -> io::Result<()> {
        let socket = match &mut self.socket {
            Some(socket) => socket,
            empty => empty.insert(UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?),
        };
        for group in self.joined.difference(wanted) {
            socket.leave_multicast_v6(group, self.link)?;
        }
        for group in wanted.difference(&self.joined) {
            socket.join_multicast_v6(group, self.link)?;
        }
        self.joined.clone_from(wanted);
        Ok(())
    }
}

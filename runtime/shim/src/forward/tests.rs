//! Forwarding between sockets of this process, driven by the real poller.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use super::*;
use crate::poll::Ready;

const HERE: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 0);
const LIMIT: Duration = Duration::from_secs(20);

struct World {
    poller: Poller,
    forwarder: Forwarder,
    scratch: Vec<u8>,
    events: usize,
}

impl World {
    fn new() -> World {
        World { poller: Poller::new().unwrap(), forwarder: Forwarder::default(), scratch: Vec::new(), events: 0 }
    }

    /// Handles events until `done`.
    fn turn(&mut self, mut done: impl FnMut(&Forwarder) -> bool) {
        let deadline = Instant::now() + LIMIT;
        let mut ready: Vec<Ready> = Vec::new();
        while !done(&self.forwarder) {
            assert!(Instant::now() < deadline, "nothing more happens");
            self.poller.wait(Some(Duration::from_millis(5)), &mut ready).unwrap();
            for item in ready.drain(..) {
                self.events += 1;
                match item.token {
                    Token::Forward(slot) => self.forwarder.on_listener(&self.poller, slot, &mut self.scratch),
                    Token::ForwardStream { slot, end } => {
                        self.forwarder.on_stream(&self.poller, slot, end, item.flags, &mut self.scratch);
                    }
                    Token::ForwardFlow(slot) => self.forwarder.on_flow(slot, &mut self.scratch),
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    fn forward(&mut self, transport: Transport, target: SocketAddr) -> SocketAddr {
        let listen = match transport {
            Transport::Tcp => TcpListener::bind(HERE).unwrap().local_addr().unwrap(),
            Transport::Udp => UdpSocket::bind(HERE).unwrap().local_addr().unwrap(),
        };
        let failures = self.forwarder.add(&self.poller, &[ForwardRule { transport, listen, target }]);
        assert!(failures.is_empty(), "{failures:?}");
        listen
    }

    fn events_in_rounds(&mut self, count: usize) -> usize {
        let before = self.events;
        let mut rounds = 0;
        self.turn(|_| {
            rounds += 1;
            rounds > count
        });
        self.events - before
    }

    fn streams(forwarder: &Forwarder) -> usize {
        forwarder.streams.iter().flatten().count()
    }
}

/// A pod that sends back what it gets.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind(HERE).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming() {
            let mut socket = socket.unwrap();
            std::thread::spawn(move || {
                let mut copy = socket.try_clone().unwrap();
                let _ = std::io::copy(&mut socket, &mut copy);
                let _ = copy.shutdown(Shutdown::Write);
            });
        }
    });
    address
}

#[test]
fn a_connection_carries_much_in_both_directions_and_ends_half_by_half() {
    let mut world = World::new();
    let address = world.forward(Transport::Tcp, echo());
    let caller = std::thread::spawn(move || {
        let mut socket = TcpStream::connect(address).unwrap();
        let sent: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
        let mut writer = socket.try_clone().unwrap();
        let copy = sent.clone();
        let writing = std::thread::spawn(move || {
            writer.write_all(&copy).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        socket.read_to_end(&mut received).unwrap();
        writing.join().unwrap();
        assert!(received == sent);
    });
    world.turn(|_| caller.is_finished());
    caller.join().unwrap();
    world.turn(|forwarder| World::streams(forwarder) == 0);
}

#[test]
fn a_caller_that_reads_nothing_costs_no_time_and_little_memory() {
    let mut world = World::new();
    let listener = TcpListener::bind(HERE).unwrap();
    let address = world.forward(Transport::Tcp, listener.local_addr().unwrap());
    let caller = TcpStream::connect(address).unwrap();
    world.turn(|forwarder| World::streams(forwarder) == 1);
    let (mut pod, _) = listener.accept().unwrap();
    pod.set_nonblocking(true).unwrap();
    let piece = vec![7u8; 1 << 16];
    // Until every buffer on the way is full: then nothing happens any more.
    while pod.write(&piece).is_ok() || world.events_in_rounds(20) > 0 {}
    // The pod hangs up while its last piece waits: still nothing to do for the loop.
    drop(pod);
    assert!(world.events_in_rounds(40) < 5);
    let held: usize = world.forwarder.streams.iter().flatten().map(Stream::held_bytes).sum();
    assert!(held > 0 && held <= 16 * 1024, "{held}");
    drop(caller);
    world.turn(|forwarder| World::streams(forwarder) == 0);
}

#[test]
fn callers_beyond_the_bound_wait_and_come_in_when_others_leave() {
    let mut world = World::new();
    let address = world.forward(Transport::Tcp, echo());
    let mut callers: Vec<TcpStream> = (0..STREAMS_MAX).map(|_| TcpStream::connect(address).unwrap()).collect();
    world.turn(|forwarder| World::streams(forwarder) == STREAMS_MAX);
    let mut last = TcpStream::connect(address).unwrap();
    last.write_all(b"x").unwrap();
    world.turn(|forwarder| forwarder.paused);
    callers.truncate(STREAMS_MAX - 1);
    last.set_nonblocking(true).unwrap();
    let mut answer = [0; 1];
    world.turn(|_| last.read(&mut answer).is_ok_and(|count| count == 1));
    assert_eq!(&answer, b"x");
    drop((callers, last));
    world.turn(|forwarder| World::streams(forwarder) == 0);
}

#[test]
fn a_pod_that_does_not_listen_closes_on_its_caller_and_a_taken_port_is_told() {
    let mut world = World::new();
    let closed = TcpListener::bind(HERE).unwrap().local_addr().unwrap();
    let address = world.forward(Transport::Tcp, closed);
    let mut caller = TcpStream::connect(address).unwrap();
    caller.set_read_timeout(Some(LIMIT)).unwrap();
    let reading = std::thread::spawn(move || caller.read(&mut [0; 1]).unwrap_or(0));
    world.turn(|_| reading.is_finished());
    assert_eq!(reading.join().unwrap(), 0);

    let taken = TcpListener::bind(HERE).unwrap();
    let listen = taken.local_addr().unwrap();
    let rule = ForwardRule { transport: Transport::Tcp, listen, target: closed };
    let [failure] = world.forwarder.add(&world.poller, &[rule]).try_into().unwrap();
    assert!(failure.contains(&format!("cannot listen on TCP {listen}")) && failure.contains("in use"), "{failure}");
    let outside = ForwardRule { listen: ([192, 0, 2, 1], 80).into(), ..rule };
    assert_eq!(world.forwarder.add(&world.poller, &[outside]).len(), 1);
}

#[test]
fn datagrams_find_the_way_back_to_each_caller_and_silent_flows_end() {
    let mut world = World::new();
    let pod = UdpSocket::bind(HERE).unwrap();
    pod.set_nonblocking(true).unwrap();
    let address = world.forward(Transport::Udp, pod.local_addr().unwrap());
    let callers: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind(HERE).unwrap()).collect();
    for (number, caller) in callers.iter().enumerate() {
        caller.connect(address).unwrap();
        caller.set_nonblocking(true).unwrap();
        caller.send(&[number as u8]).unwrap();
    }
    let mut answered = 0;
    world.turn(|_| {
        let mut buffer = [0; 8];
        while let Ok((count, from)) = pod.recv_from(&mut buffer) {
            buffer[count] = b'!';
            pod.send_to(&buffer[..=count], from).unwrap();
            answered += 1;
        }
        answered == 3
    });
    for (number, caller) in callers.iter().enumerate() {
        let mut buffer = [0; 8];
        let mut count = 0;
        world.turn(|_| {
            count = caller.recv(&mut buffer).unwrap_or(0);
            count > 0
        });
        assert_eq!(&buffer[..count], &[number as u8, b'!']);
    }
    let deadline = world.forwarder.deadline().unwrap();
    world.forwarder.expire(&world.poller, deadline - Duration::from_millis(1));
    assert!(world.forwarder.deadline().is_some());
    world.forwarder.expire(&world.poller, deadline + Duration::from_secs(60));
    assert_eq!(world.forwarder.deadline(), None);
}

//! Echo servers that prefix each answer with the pod's name.

use std::io::{self, Read, Write};
use std::net::{TcpListener, UdpSocket};

use crate::number;

/// `udp-echo [PORT]`: answers each datagram with `NAME: datagram`.
pub(crate) fn udp_echo(arguments: &[String]) -> io::Result<u8> {
    super::process::exit_on_sigterm()?;
    let port: u16 = number(arguments, 0, 8081)?;
    let socket = UdpSocket::bind(("::", port)).or_else(|_| UdpSocket::bind(("0.0.0.0", port)))?;
    let name = super::process::host_name().unwrap_or_default();
    println!("echoing datagrams on {}", socket.local_addr()?);
    let mut buffer = vec![0u8; 65_535];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer)?;
        let mut answer = format!("{name}: ").into_bytes();
        answer.extend_from_slice(&buffer[..length]);
        let _ = socket.send_to(&answer, peer);
    }
}

/// `tcp-echo [PORT]`: gives back every byte of each connection.
pub(crate) fn tcp_echo(arguments: &[String]) -> io::Result<u8> {
    super::process::exit_on_sigterm()?;
    let port: u16 = number(arguments, 0, 8082)?;
    let listener = TcpListener::bind(("::", port)).or_else(|_| TcpListener::bind(("0.0.0.0", port)))?;
    println!("echoing connections on {}", listener.local_addr()?);
    for mut connection in listener.incoming().flatten() {
        std::thread::spawn(move || -> io::Result<()> {
            let mut buffer = [0u8; 16_384];
            loop {
                let length = connection.read(&mut buffer)?;
                if length == 0 {
                    return Ok(());
                }
                connection.write_all(&buffer[..length])?;
            }
        });
    }
    Ok(0)
}

//! The few file commands that `kubectl exec` and `kubectl cp` need in a pod.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

/// `cat [FILE…]`: files, or standard input.
pub(crate) fn cat(arguments: &[String]) -> io::Result<u8> {
    let mut out = io::stdout().lock();
    if arguments.is_empty() {
        let mut input = io::stdin().lock();
        let mut buffer = [0u8; 16_384];
        loop {
            let length = input.read(&mut buffer)?;
            if length == 0 {
                return Ok(0);
            }
            out.write_all(&buffer[..length])?;
            out.flush()?;
        }
    }
    for path in arguments {
        let mut file = File::open(path).map_err(|error| io::Error::other(format!("{path}: {error}")))?;
        io::copy(&mut file, &mut out)?;
    }
    Ok(0)
}

/// `ls [DIRECTORY]`: sorted names, one a line.
pub(crate) fn ls(arguments: &[String]) -> io::Result<u8> {
    let directory = arguments.first().map_or(".", String::as_str);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(|error| io::Error::other(format!("{directory}: {error}")))? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    for name in names {
        println!("{name}");
    }
    Ok(0)
}

/// `write FILE TEXT`: replaces the file's contents.
pub(crate) fn write(arguments: &[String]) -> io::Result<u8> {
    let [path, text] = arguments else { return Err(io::Error::other("usage: write FILE TEXT")) };
    fs::write(path, format!("{text}\n"))?;
    Ok(0)
}

/// `tar c…f - PATH` and `tar x…f - [-C DIRECTORY]`, as `kubectl cp` calls them.
pub(crate) fn tar(arguments: &[String]) -> io::Result<u8> {
    let mode = arguments.first().map(|mode| mode.trim_start_matches('-').to_owned()).unwrap_or_default();
    let mut directory = ".".to_owned();
    let mut paths = Vec::new();
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-C" => directory = rest.next().cloned().unwrap_or_default(),
            "-" | "-f" => {}
            path => paths.push(path.to_owned()),
        }
    }
    if mode.contains('x') {
        let mut archive = tar::Archive::new(io::stdin().lock());
        archive.set_preserve_permissions(mode.contains('p'));
        archive.unpack(&directory)?;
        return Ok(0);
    }
    if mode.contains('c') {
        let mut builder = tar::Builder::new(io::stdout().lock());
        for path in paths {
            let name = path.trim_start_matches('/');
            let source = Path::new(&directory).join(&path);
            if fs::symlink_metadata(&source)?.is_dir() {
                builder.append_dir_all(name, &source)?;
            } else {
                builder.append_path_with_name(&source, name)?;
            }
        }
        builder.into_inner()?.flush()?;
        return Ok(0);
    }
    Err(io::Error::other("usage: tar cf - PATH… or tar xf - [-C DIRECTORY]"))
}

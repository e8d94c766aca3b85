//! The embedded store: SQLite in WAL mode, synchronous=FULL, one connection owned by the writer thread.
//!
//! The database holds present records and, for the bounded tail, the last states of removed keys: with the revisions
//! of the present records that is enough to resume a watch after a restart. Every read is served from memory, so the
//! only SQL after start is the commit itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use crate::StoreError;
use crate::clock::now_seconds;
use crate::durable::Durable;
use crate::record::{LoadedRow, Record};
use crate::resident::Resident;
use crate::view::{Event, EventKind, TailLimits, View};
use crate::writer::Engine;

const FORMAT: i64 = 1;

/// How to open a [`SqliteStore`].
#[derive(Debug, Clone)]
pub struct SqliteOptions {
    /// The database file; its directory must exist.
    pub path: PathBuf,
    /// At most this many events are kept in each bucket.
    pub tail_events: usize,
}

impl SqliteOptions {
    /// The usual options for a database at `path`.
    pub fn new(path: impl Into<PathBuf>) -> SqliteOptions {
        SqliteOptions { path: path.into(), tail_events: TailLimits::default().events }
    }
}

/// A [`Store`](crate::Store) kept in one SQLite database.
pub struct SqliteStore {
    engine: Engine,
}

impl SqliteStore {
    /// Opens or creates the database and reads it into memory.
    pub fn open(options: SqliteOptions) -> Result<SqliteStore, StoreError> {
        let database = Database::open(&options.path)?;
        let limits = TailLimits { events: options.tail_events.max(1), ..TailLimits::default() };
        let view = database.load(limits)?;
        Ok(SqliteStore { engine: Engine::start(view, database)? })
    }
}

impl Resident for SqliteStore {
    fn engine(&self) -> &Engine {
        &self.engine
    }
}

struct Database {
    connection: Connection,
    path: String,
}

/// Makes the database readable by its owner only; SQLite gives its log the same mode. It holds every secret there is.
fn keep_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
    let file = std::fs::OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))
}

const SCHEMA: &str = "
    CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 1), revision INTEGER NOT NULL, floor INTEGER NOT NULL);
    INSERT INTO meta VALUES (1, 1, 1);
    CREATE TABLE records (key TEXT PRIMARY KEY NOT NULL, revision INTEGER NOT NULL, created INTEGER NOT NULL,
                          digits_at INTEGER, expires_at INTEGER, value BLOB NOT NULL);
    CREATE TABLE tombstones (revision INTEGER PRIMARY KEY, key TEXT NOT NULL, created INTEGER NOT NULL,
                             digits_at INTEGER, value BLOB NOT NULL);
";

impl Database {
    fn open(path: &Path) -> Result<Database, StoreError> {
        let shown = path.display().to_string();
        let failed = |operation| {
            let path = shown.clone();
            move |source| StoreError::Open { operation, path, source }
        };
        keep_private(path).map_err(|source| StoreError::File { path: shown.clone(), source })?;
        let connection = Connection::open(path).map_err(failed("open"))?;
        connection.busy_timeout(Duration::from_secs(2)).map_err(failed("configure"))?;
        connection
            .execute_batch(
                "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
                 PRAGMA cache_size = -1024; PRAGMA temp_store = MEMORY; PRAGMA journal_size_limit = 16777216;",
            )
            .map_err(failed("configure"))?;
        let format: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).map_err(failed("read"))?;
        let database = Database { connection, path: shown.clone() };
        match format {
            0 => database.create().map_err(failed("create tables in"))?,
            FORMAT => {}
            other => {
                let detail = format!("it has format {other}, this version reads format {FORMAT}");
                return Err(StoreError::Format { path: shown, detail });
            }
        }
        Ok(database)
    }

    fn create(&self) -> rusqlite::Result<()> {
        let tx = self.connection.unchecked_transaction()?;
        tx.execute_batch(SCHEMA)?;
        tx.execute_batch(&format!("PRAGMA user_version = {FORMAT}"))?;
        tx.commit()
    }

    fn load(&self, limits: TailLimits) -> Result<View, StoreError> {
        let read = |source| StoreError::Open { operation: "read", path: self.path.clone(), source };
        let meta = self
            .connection
            .query_row("SELECT revision, floor FROM meta", [], |row| Ok((unsigned(row.get(0)?), unsigned(row.get(1)?))))
            .optional()
            .map_err(read)?;
        let Some((revision, floor)) = meta else {
            return Err(StoreError::Format { path: self.path.clone(), detail: "its meta row is missing".into() });
        };
        let records =
            self.rows("SELECT key, revision, created, digits_at, expires_at, value FROM records").map_err(read)?;
        let tombstones =
            self.rows("SELECT key, revision, created, digits_at, NULL, value FROM tombstones").map_err(read)?;
        let mut view = View::new(revision, floor, limits);
        view.load(records, tombstones, now_seconds());
        Ok(view)
    }

    fn rows(&self, query: &str) -> rusqlite::Result<Vec<Arc<Record>>> {
        let mut statement = self.connection.prepare(query)?;
        let rows = statement.query_map([], |row| {
            let key: String = row.get(0)?;
            Ok(Arc::new(Record::loaded(LoadedRow {
                key: key.into(),
                revision: unsigned(row.get(1)?),
                created_revision: unsigned(row.get(2)?),
                digits_at: row.get(3)?,
                expires_at: row.get::<_, Option<i64>>(4)?.map(unsigned),
                value: row.get(5)?,
            })))
        })?;
        rows.collect()
    }

    fn write(&mut self, events: &[Arc<Event>]) -> rusqlite::Result<()> {
        let tx = self.connection.transaction()?;
        for event in events {
            let record = &event.record;
            match event.kind {
                EventKind::Put => {
                    let mut put = tx.prepare_cached(
                        "INSERT INTO records (key, revision, created, digits_at, expires_at, value)
                         VALUES (?1, ?2, ?3, ?4, ?5, ?6)
                         ON CONFLICT (key) DO UPDATE SET revision = ?2, created = ?3, digits_at = ?4, expires_at = ?5,
                         value = ?6",
                    )?;
                    put.execute(params![
                        &**record.key(),
                        signed(record.revision()),
                        signed(record.created_revision()),
                        record.digits_at(),
                        record.expires_at().map(signed),
                        &record.value()[..],
                    ])?;
                }
                EventKind::Delete => {
                    tx.prepare_cached("DELETE FROM records WHERE key = ?1")?.execute([&**record.key()])?;
                    let mut bury = tx.prepare_cached(
                        "INSERT INTO tombstones (revision, key, created, digits_at, value) VALUES (?1, ?2, ?3, ?4, ?5)",
                    )?;
                    bury.execute(params![
                        signed(record.revision()),
                        &**record.key(),
                        signed(record.created_revision()),
                        record.digits_at(),
                        &record.value()[..],
                    ])?;
                }
            }
        }
        if let Some(last) = events.last() {
            tx.prepare_cached("UPDATE meta SET revision = ?1")?.execute([signed(last.revision())])?;
        }
        tx.commit()
    }
}

impl Durable for Database {
    fn commit(&mut self, events: &[Arc<Event>]) -> Result<(), StoreError> {
        self.write(events).map_err(|source| StoreError::Commit { path: self.path.clone(), source: Arc::new(source) })
    }

    fn forget(&mut self, floor: u64) -> Result<(), StoreError> {
        let forgotten = (|| {
            let tx = self.connection.transaction()?;
            tx.prepare_cached("DELETE FROM tombstones WHERE revision <= ?1")?.execute([signed(floor)])?;
            tx.prepare_cached("UPDATE meta SET floor = max(floor, ?1)")?.execute([signed(floor)])?;
            tx.commit()
        })();
        forgotten.map_err(|source| StoreError::Commit { path: self.path.clone(), source: Arc::new(source) })
    }

    fn close(&mut self) {
        if let Err(error) = self.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)") {
            tracing::warn!(%error, "the write-ahead log could not be folded into the database; it will be at next start");
        }
    }
}

/// SQLite integers are signed; revisions and seconds stay far below the sign bit.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}
